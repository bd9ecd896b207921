"""Defences against bad updates: guards look at one, combiners at a whole buffer."""
