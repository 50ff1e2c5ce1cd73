"""How the bundled model is made: data, samples, training, evaluation, model card."""
