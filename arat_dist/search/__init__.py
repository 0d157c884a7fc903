"""Searches over recipe keys, without Ray: what may vary, what is tried next, what came out."""
