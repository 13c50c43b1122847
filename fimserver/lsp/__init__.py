"""The language server: LSP types, encodings, connections, the life of a request.

Knows:  LSP, documents, the engine's client.  Never: tokens, tensors, torch.
"""
