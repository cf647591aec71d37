"""DCCA: descend, communicate, communicate, ascend (BigMac, arXiv 2502.16927)."""
