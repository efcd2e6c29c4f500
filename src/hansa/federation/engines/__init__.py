"""Engines carry the messages between nodes. A method never knows which one it runs on."""
