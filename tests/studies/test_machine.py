"""How a study assigns the hardware."""

from studies import machine


def test_slots(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = [slot["CUDA_VISIBLE_DEVICES"] for slot in machine.find_slots("auto", 3)]
    assert gpus == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in machine.find_slots("cuda", None)] == ["5", "7"]
    assert machine.find_slots("cuda:1", None) == [{}]
    assert machine.find_slots("cpu", None) == [{"OMP_NUM_THREADS": "1"}] * machine.cores()
