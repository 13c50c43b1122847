"""Languages: their grammars, the syntax of their comments, strings and blocks, and the names that editors use."""
