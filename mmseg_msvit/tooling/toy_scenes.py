"""Drawn street scenes: smooth skies, meadows and roads next to crowds, trees and cars."""

from typing import Tuple

import cv2
import numpy as np

CLASSES = ('sky', 'meadow', 'road', 'building', 'tree', 'person', 'car')
SKY, MEADOW, ROAD, BUILDING, TREE, PERSON, CAR = range(len(CLASSES))


def scene(rng: np.random.Generator, size: int = 256) -> Tuple[np.ndarray, np.ndarray]:
    """Draws one scene.

    Returns:
        (size, size, 3) uint8 RGB image and (size, size) uint8 labels.
    """
    image = np.zeros((size, size, 3), np.float32)
    labels = np.zeros((size, size), np.uint8)
    s = size / 256
    row = np.arange(size, dtype=np.float32)[:, None, None]
    horizon = int(rng.uniform(0.35, 0.55) * size)

    def paint(label, color, draw, *shape):
        """Draws one of OpenCV's shapes, filled, into both; ``color`` is (3,), or an image of colours."""
        filled = () if draw is cv2.fillConvexPoly else (-1,)
        draw(labels, *shape, label, *filled)
        if np.ndim(color) == 1:
            draw(image, *shape, np.asarray(color, float).tolist(), *filled)
        else:
            mask = draw(np.zeros((size, size), np.uint8), *shape, 1, *filled).astype(bool)
            image[mask] = np.broadcast_to(color, image.shape)[mask]

    def spot():
        """A point on the ground and how large things are there."""
        depth = rng.uniform(0.05, 1)
        return int(rng.uniform(0, size)), int(horizon + depth * (size - horizon)), s * (0.35 + 0.65 * depth)

    whole = (0, 0), (size, size)
    paint(SKY, (150, 190, 235) + rng.normal(0, 15, 3) + np.array([60, 40, 15]) * row / size, cv2.rectangle, *whole)
    meadow = (110, 150, 70) + rng.normal(0, 15, 3) + 40 * (0.5 - row / size)
    paint(MEADOW, meadow, cv2.rectangle, (0, horizon), (size, size))
    far, near, width = rng.uniform(0.2, 0.8), rng.uniform(0, 1), rng.uniform(0.15, 0.35)
    corners = np.array([[far * size, horizon], [(near + width) * size, size], [(near - width) * size, size]])
    paint(ROAD, (105, 105, 110) + rng.normal(0, 8, 3), cv2.fillConvexPoly, corners.astype(np.int32))

    for _ in range(rng.integers(0, 4)):
        x, half, height = rng.uniform(0, size), rng.uniform(12, 35) * s, rng.uniform(25, 85) * s
        left, top = int(x - half), int(horizon - height)
        wall = (175, 140, 115) + rng.normal(0, 25, 3)
        paint(BUILDING, wall, cv2.rectangle, (left, top), (int(x + half), horizon + int(4 * s)))
        step = max(5, int(9 * s))
        for y in range(top + step // 2, horizon - step // 2, step):
            for u in range(left + step // 2, int(x + half) - step // 2, step):
                pane = (u, y), (u + step // 2, y + step // 2)
                paint(BUILDING, wall * rng.uniform(0.35, 0.6), cv2.rectangle, *pane)

    for _ in range(rng.integers(1, 5)):
        x, y, scale = spot()
        y = int(horizon + 0.3 * (y - horizon))
        paint(TREE, (90, 65, 45), cv2.rectangle, (x - int(3 * scale), y - int(30 * scale)), (x + int(3 * scale), y))
        leaves = (45, 95, 40) + rng.normal(0, 12, 3) + rng.normal(0, 28, (size, size, 1))
        for _ in range(rng.integers(6, 12)):
            center = int(x + rng.normal(0, 11) * scale), int(y + (rng.normal(0, 9) - 42) * scale)
            paint(TREE, leaves, cv2.circle, center, int(rng.uniform(6, 13) * scale))

    for _ in range(rng.integers(0, 4)):
        x, y, scale = spot()
        color = rng.uniform(40, 230, 3)
        half, height = int(22 * scale), int(13 * scale)
        paint(CAR, color, cv2.rectangle, (x - half, y - height), (x + half, y))
        paint(CAR, color * 0.7, cv2.rectangle, (x - half // 2, y - 2 * height), (x + half // 2, y - height))
        for wheel in (x - half // 2, x + half // 2):
            paint(CAR, (25, 25, 25), cv2.circle, (wheel, y), max(2, int(5 * scale)))

    if rng.random() < 0.85:
        x0, y0, _ = spot()
        for _ in range(rng.integers(10, 45)):
            x, y = int(x0 + rng.normal(0, 28) * s), int(y0 + rng.normal(0, 14) * s)
            height = max(10, int(rng.uniform(16, 26) * s))
            color = rng.uniform(30, 240, 3)
            paint(PERSON, color, cv2.ellipse, (x, y - height // 2), (max(2, height // 6), height // 2), 0, 0, 360)
            paint(PERSON, (215, 170, 140), cv2.circle, (x, y - height), max(2, height // 7))

    image = image * rng.uniform(0.75, 1.1) + rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels
