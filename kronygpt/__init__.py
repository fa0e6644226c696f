"""What the scripts of KronyGPT share."""

__version__ = "3.0.0"
