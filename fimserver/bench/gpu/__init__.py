"""Measure a GPU with one command, and write a page with the results (``fimserver bench gpu``)."""
