"""From a snapshot to what the engine is told, and from its answer to what is offered.

Knows:  text, syntax trees, holes; budgets in characters.  Never: LSP types, tokens, tensors.
"""
