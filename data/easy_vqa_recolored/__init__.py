"""The recoloured copies of easy_vqa's training pictures, captioned. The card is README.md."""
