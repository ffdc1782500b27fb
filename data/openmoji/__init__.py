"""OpenMoji: named pictures by concept, with their variants. The card is README.md."""
