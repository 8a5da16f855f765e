from torchdistpackage.runtime.program import compile_program
from torchdistpackage.schedule import Plan, add_communication, build


def shown(program):
    def one(at):
        microbatch = at.microbatch if at.microbatch >= 0 else ""
        return f"{at.stage}{at.op.value}{microbatch}" + (f">{at.send_to}" if at.send_to >= 0 else "")

    return " ".join(map(one, program.instructions))


def test_sends_go_out_with_their_compute_action_and_inputs_are_posted_when_taken():
    plan = build("1f1b", 2, 3)
    assert shown(compile_program(plan, 0, 0)) == "0F0>1 0F1>1 0B0 0F2>1 0B1 0B2 0REDUCE_GRAD"
    assert shown(compile_program(plan, 1, 0)) == "1F0 1B0>0 1F1 1B1>0 1F2 1B2>0 1REDUCE_GRAD"


def test_receives_can_be_posted_one_action_ahead():
    plan = build("1f1b", 2, 3)
    assert shown(compile_program(plan, 1, 1)).startswith("1F0 1RECV_F1 1B0>0 1F1 1RECV_F2 1B1>0")


def test_a_receive_that_moved_forward_is_posted_in_its_place():
    plan = add_communication(Plan.from_text("0F0 2F0 0F1 2F1 2B0 2B1 0B0 0B1 \n 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"))
    assert "1F0>0 3RECV_F0 1F1>0 3F0" in shown(compile_program(plan, 1, 0))


def test_what_an_arrival_proves():
    plan = build("1f1b", 2, 3)
    proofs = {str(plan.actions[0][at.position]): at.proves for at in compile_program(plan, 0, 0).instructions}
    # 0B0 uses what rank 1 sent after it had taken the output of 0F0.
    assert proofs["0B0"] == ((1, (0, 0, 0)),)
    assert proofs["0B2"] == ((1, (0, 0, 2)),)


def test_the_token_visits_every_rank_once():
    for p in (1, 2, 5):
        for forward_only in (False, True):
            plan = build("gpipe", p, 2, forward_only=forward_only)
            programs = [compile_program(plan, rank, 0) for rank in range(p)]
            starts = [rank for rank in range(p) if programs[rank].token_from is None]
            assert starts == ([p - 1] if forward_only else [0])
            way = starts
            while programs[way[-1]].token_to is not None:
                way.append(programs[way[-1]].token_to)
            assert sorted(way) == list(range(p))


def test_a_split_backward_has_the_backwards_of_its_stage():
    plan = build("1f1b", 2, 3)
    assert compile_program(plan, 1, 0).backwards == {1: (0, 1, 2)}
