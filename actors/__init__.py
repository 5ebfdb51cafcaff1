"""The generation plane: prompts to candidates, across weight versions. Imports streaming only.

Reading order: prompts, scheduler, tokens, engine, generator, keeper, update, parity, reading, weight_loader,
transformers_engine.
"""
