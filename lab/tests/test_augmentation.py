import torch

from tdlrt_lab.data.augmentation import PADDING, draw_moves, move_images


def slow(images, moves):
    """Image by image and pixel by pixel, in float64."""
    count, _, height, width = images.shape
    moved = torch.zeros(images.shape, dtype=torch.float64)
    for n in range(count):
        row, column, mirrored = moves[n].tolist()
        for i in range(height):
            for j in range(width):
                source = width - 1 - j if mirrored else j
                y, x = row + i - PADDING, column + source - PADDING
                if 0 <= y < height and 0 <= x < width:
                    moved[n, :, i, j] = images[n, :, y, x].double()
    return moved


def test_moves_equal_those_of_the_loop():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 7, 9), generator=generator).to(torch.uint8)
    moves = draw_moves(20, generator)
    moved = move_images(images, moves)
    assert moved.dtype == torch.uint8
    assert torch.equal(moved.double(), slow(images, moves))


def test_the_middle_without_a_mirror_is_the_image():
    images = torch.rand(2, 1, 5, 6)
    assert torch.equal(move_images(images, torch.tensor([[PADDING, PADDING, 0]] * 2)), images)


def test_moves_are_drawn_evenly_and_by_the_generator():
    moves, again = (draw_moves(9000, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(moves, again)
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts = moves[:, column].bincount()
        assert len(counts) == values
        assert ((counts * values / 9000 - 1).abs() < 0.15).all()
