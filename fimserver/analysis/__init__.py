"""The pipeline's steps on the user's text, in a process of their own that may die."""
