"""Let other engines answer: servers that run here or elsewhere, and llama.cpp in our own process."""
