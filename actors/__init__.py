"""The generation plane: prompts to candidates, across weight versions. Imports streaming only.

Reading order: prompts, scheduler, engine, generator, weight_loader, parity.
"""
