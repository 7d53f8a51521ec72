"""stable-baselines3's PPO as clients of a Flower federation."""
