"""PDP written with autograd: thresholds by sorting, t held constant, SGD, one batch of 8 rows a step in order."""

import torch


def plain_training(model, rows, steps, factors, zeros, soft_mask, *, warmup, ramp, rate):
    """Train a copy of a model's parameters and return the losses.

    Args:
        model: stays as it is.
        rows: tokenized rows.
        steps: number of steps.
        factors: name of a weight -> what its magnitudes are multiplied by.
        zeros: name -> number of its weights that are pruned in the end.
        soft_mask: returns the mask, from the squares of the products and t.
        warmup: dense steps.
        ramp: steps in which the number of pruned weights rises.
        rate: learning rate.
    """
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    found = []
    for step in range(steps):
        effective = dict(parameters)
        if step >= warmup:
            share = min(1, (step - warmup + 1) / ramp)
            for name, factor in factors.items():
                weight = parameters[name]
                ordered = (factor * weight.detach()).abs().flatten().sort().values
                count = round(share * zeros[name])
                t = (ordered[count - 1] + ordered[count]) / 2
                effective[name] = weight * soft_mask((factor * weight) ** 2, t)
        batch = rows[8 * step : 8 * step + 8]
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        loss = torch.func.functional_call(model, effective, kwargs=batch).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        with torch.no_grad():
            for weight, gradient in zip(parameters.values(), gradients, strict=True):
                weight -= rate * gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        found.append(loss.item())
    return found
