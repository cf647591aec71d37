"""Commands of ``hf-moe`` that have a file of their own; `cli.py` names them. Each imports its feature inside."""
