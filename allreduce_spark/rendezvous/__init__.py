"""The driver-side meeting point: who takes part, how do they find each other, is everyone alive."""
