"""Personalise text-to-image diffusion models with Kronecker adapters (DiffuseKronA)."""

__version__ = "0.1.0"
