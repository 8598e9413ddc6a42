"""Pure tensor math of the objective: contrastive loss and reward, advantages, policy loss, KL, aggregation, metrics."""
