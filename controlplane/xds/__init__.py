"""Envoy's v3 xDS for l7proxy, and for Envoy itself: the model as Envoy's types, and the aggregated stream (ADS)."""
