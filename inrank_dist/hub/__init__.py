"""Models and tokenizers in the formats of Hugging Face."""
