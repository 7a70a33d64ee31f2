"""Weights of other implementations, in and out; and of plain models, into looped ones.

    model, params = loopformer.convert.from_official('loopformer', 'ckpt.pt', heads=32)
    loopformer.logits(model, params, tokens, steps=4)
"""
from loopformer.convert.official import from_official, to_official
from loopformer.convert.retrofit import retrofit

__all__ = ['from_official', 'retrofit', 'to_official']
