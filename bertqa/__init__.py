"""Pre- and post-processing of extractive question answering with BERT; needs numpy and tokenizers only."""
