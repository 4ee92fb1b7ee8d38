"""Engines that dynmask plugs into, one module each; none is imported before it is asked for."""
