"""The result: one-step scheduler, pipeline and export that any diffusers user can load."""
