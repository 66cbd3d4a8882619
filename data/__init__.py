"""Documents to packed rows. The one door for training is `data.loader`.

Made once, by `scripts.prepare_data`:
    documents.py   sources -> a stream of documents (text, jsonl, parquet, files, repository, hub, the bundled two), from any place on
    duplicates.py  which texts have been seen
    tokenizer.py   one door to sentencepiece and Hugging Face tokenizers; trains the bundled one
    workers.py     tokenises stretches of documents in parallel, in order
    writer.py      token shards and the index of documents; the folder that is complete or absent, and its commits
    prepare.py     the whole of it: documents -> held-out choice -> tokens -> shards -> manifest
    manifest.py    what a prepared folder says about itself, and its checksums
Asked of a finished one, by `scripts.inspect_data`:
    contamination.py  what held-out documents share with training documents
Read by a run that prepares nothing:
    reading.py     a source read and tokenised by a process of its own, ahead of training; failures tried again
    streaming.py   groups of its documents as they come, rows of them, the corpus whose sources they are
Read at each step of training:
    shards.py      a prepared corpus, checked and memory-mapped
    mix.py         pools of documents by source and length, and the rule that takes rows from them in the shares of a stage's mix
    stream.py      which rows of tokens come in which order: documents shuffled, then rows; a pure function, its state a few integers
    packing.py     which documents a row holds: laid end to end, best fit, or one alone
    batch.py       the packed rows a model is fed
    loader.py      steps for one rank, with integer state; held-out rows
"""
