"""Describe a model without loading it: names, folders, sizes, and whether it fits a GPU.

Knows:  config files, file headers, the hub.  Never: torch, tensors, documents.
"""
