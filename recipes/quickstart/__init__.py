"""The offline quickstart: real text from the running Python, a base model trained on it, and a task made of it.

`corpus` reads the source of the standard library, `docstrings` and `arithmetic` build tasks, `ngram` is the model the
base must beat, `pretrain` trains that base. Nothing here needs the network.
"""
