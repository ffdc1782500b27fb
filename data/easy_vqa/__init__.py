"""easy-vqa: one coloured shape on a pale background, with questions. The card is README.md."""
