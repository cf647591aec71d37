"""Commands of ``hf-moe``, a file per feature; `cli.py` registers them. Each imports its feature inside its function."""
