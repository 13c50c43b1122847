"""Serve LSP: types, encodings, connections, requests.

Knows:  LSP, documents, the engine's client.  Never: tokens, tensors, torch.
"""
