"""From captions to token ids: cleaning, tokenizers, vocabularies."""
