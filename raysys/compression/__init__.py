"""Smaller models: shards in, layer after layer, packed files out that stock engines load. The maths lives in `raysys.methods`."""
