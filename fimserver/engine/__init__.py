"""Turn a FimContext into the text of a middle: prompts, KV cache, canvases, weights, and the worker process.

Knows:  token ids, canvases, logits, weights.  Never: documents, LSP, files other than weights.
"""
