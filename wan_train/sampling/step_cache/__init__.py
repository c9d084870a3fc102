"""Step caches: steps of a video that reuse what an earlier step computed."""
