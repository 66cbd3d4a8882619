"""Tests of documents, tokenizers, shards, packing and the stream."""
