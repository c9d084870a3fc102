"""Step caches, which reuse results of earlier sampling steps."""
