"""Devices and processes: the mesh, how processes find each other, memory pages."""
