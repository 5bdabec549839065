"""The study of the gap between a product of experts and backprop: arms, trainings, measurements, decision."""
