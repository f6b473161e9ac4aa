"""Models to share: exported folders, their cards, and the Hugging Face hub."""
