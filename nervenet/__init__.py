"""nervenet: a U-Net from scratch, on NumPy and CuPy, for finding nerves in ultrasound images."""

__version__ = '0.1.0'
