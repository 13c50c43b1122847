"""Turn a snapshot into the engine's input, and the engine's answer into a completion.

Knows:  text, syntax trees, holes; budgets in characters.  Never: LSP types, tokens, tensors.
"""
