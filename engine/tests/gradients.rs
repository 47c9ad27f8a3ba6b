//! Every op's gradient on random shapes, values and views: against central differences in f64, then f32 and bf16
//! against f64. And the checker itself, against wrong gradients.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // the helpers of tests may panic

use flowtape_engine::gradcheck::{Case, Draw, Sample, check_dtype, check_gradient, rerun_on_instruction_sets};
use flowtape_engine::nn::{Init, Linear, Param, ParamBuilder};
use flowtape_engine::tape::{Forward, InputGradients, Op, Saved, apply_one};
use flowtape_engine::{DType, Device, Error, GradientSink, Gradients, Result, Tape, Tensor, VarId, ops};
use proptest::prelude::*;

fn all_cases(seed: u64, check: impl Fn(&Sample) -> Result<Result<(), String>>) -> Result<(), TestCaseError> {
    for case in ops::cases() {
        let fail = |what: String| TestCaseError::fail(format!("{} (seed {seed}): {what}", case.name));
        let sample = (case.make)(&mut Draw::new(seed)).map_err(|e| fail(e.to_string()))?;
        check(&sample).map_err(|e| fail(e.to_string()))?.map_err(fail)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gradients_match_central_differences(seed: u64) {
        all_cases(seed, |sample| check_gradient(sample, seed ^ 1))?;
    }

    #[test]
    fn f32_matches_f64(seed: u64) {
        all_cases(seed, |sample| check_dtype(sample, DType::F32, &Device::cpu(), seed ^ 2))?;
    }

    #[test]
    fn bf16_is_within_its_rounding(seed: u64) {
        all_cases(seed, |sample| check_dtype(sample, DType::BF16, &Device::cpu(), seed ^ 3))?;
    }
}

#[test]
fn every_instruction_set_passes() {
    rerun_on_instruction_sets("every_instruction_set_passes").unwrap();
}

/// x^3, with a gradient that is wrong by a factor or forgets an element.
#[derive(Debug)]
enum Cube {
    Right,
    Factor,
    Element,
}

impl Op for Cube {
    fn name(&self) -> &'static str {
        "cube"
    }

    fn forward(&self, cx: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        cx.save("x", &inputs[0]);
        Ok(vec![inputs[0].square()?.mul(&inputs[0])?])
    }

    fn backward(&self, saved: &Saved, grads: &[Option<Tensor>], out: &mut InputGradients) -> Result<()> {
        let Some(grad) = &grads[0] else { return Ok(()) };
        let right = saved.get("x")?.square()?.mul(grad)?.mul_scalar(3.0)?;
        let dx = match self {
            Self::Right => right,
            Self::Factor => right.mul_scalar(1.0001)?,
            Self::Element => right.narrow(0, 1, right.dims()[0] - 1)?.pad(0, 1, 0)?,
        };
        out.set(0, dx);
        Ok(())
    }
}

fn planted(make: fn() -> Cube) -> Result<Result<(), String>> {
    let input = Draw::new(3).tensor(&[6], 0.5, 2.0)?;
    let sample = Sample::new(vec![input], move |xs| apply_one(make(), &[&xs[0]]))?;
    check_gradient(&sample, 5)
}

#[test]
fn the_checker_catches_planted_mistakes() -> Result<()> {
    assert_eq!(planted(|| Cube::Right)?, Ok(()));
    assert!(planted(|| Cube::Factor)?.is_err());
    assert!(planted(|| Cube::Element)?.is_err());
    Ok(())
}

#[derive(Debug)]
struct NoGradient;

impl Op for NoGradient {
    fn name(&self) -> &'static str {
        "no_gradient"
    }

    fn forward(&self, _: &mut Forward, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0].clone()])
    }

    fn differentiable(&self) -> bool {
        false
    }
}

#[test]
fn an_op_without_gradient_in_a_recording_is_an_error() -> Result<()> {
    let x = Tensor::ones(&[2], DType::F32, &Device::cpu())?;
    assert!(apply_one(NoGradient, &[&x]).is_ok());
    assert!(matches!(apply_one(NoGradient, &[&Tape::new().leaf(&x)]), Err(Error::NoBackward { op: "no_gradient" })));
    Ok(())
}

#[test]
fn backward_over_overwritten_storage_is_an_error() -> Result<()> {
    let tape = Tape::new();
    let x = tape.leaf(&Tensor::ones(&[2], DType::F32, &Device::cpu())?);
    let y = x.square()?.sum_all()?;
    x.copy_from(&Tensor::zeros(&[2], DType::F32, &Device::cpu())?)?;
    assert!(matches!(tape.backward(&y), Err(Error::Overwritten { .. })));
    Ok(())
}

#[test]
fn checkpointing_gives_the_same_bits() -> Result<()> {
    let device = Device::cpu();
    let mut draw = Draw::new(11);
    let x = draw.standard(&[5, 8])?.to_dtype(DType::F32)?;
    let w = draw.standard(&[8, 8])?.to_dtype(DType::F32)?;
    let run = |checkpointed: bool| -> Result<(Vec<f32>, Vec<f32>)> {
        let tape = Tape::new();
        let (x, w) = (tape.leaf(&x), tape.leaf(&w));
        let block = |xs: &[Tensor]| -> Result<Vec<Tensor>> {
            let hidden = ops::linear(&xs[0], &xs[1], None)?.gelu()?;
            Ok(vec![hidden.matmul(&xs[1])?, hidden.square()?, hidden.neg()?])
        };
        let y =
            if checkpointed { flowtape_engine::checkpoint(&[&x, &w], block)? } else { block(&[x.clone(), w.clone()])? };
        // The last output is not used; the block's inputs are read outside, too.
        let outside = x.mul(&w.narrow(0, 0, 5)?)?;
        let gradients: Gradients = tape.backward(&y[0].square()?.mul(&y[1])?.add(&outside)?.mean_all()?)?;
        let of = |t: &Tensor| gradients.of(t).unwrap().to_vec::<f32>();
        Ok((of(&x)?, of(&w)?))
    };
    assert_eq!(run(true)?, run(false)?);
    assert!(device.same(x.device()));
    Ok(())
}

#[test]
fn a_checkpointed_block_may_read_constants_of_the_tape_around_it() -> Result<()> {
    let mut draw = Draw::new(5);
    let (x, mask) = (draw.standard(&[3, 4])?, draw.standard(&[3, 4])?);
    let root = ParamBuilder::new(3, DType::F64, &Device::cpu());
    let layer = Linear::new(&root, 4, 4, true)?;
    let run = |checkpointed: bool| -> Result<Vec<Vec<f64>>> {
        let tape = Tape::new();
        // Both carry the tape and are no variables.
        let (x, mask, layer) = (tape.attach(&x), tape.attach(&mask), layer.clone());
        let block = move |xs: &[Tensor]| Ok(vec![layer.forward(&mask.mul(&xs[0])?)?.mul(&mask)?]);
        let y = if checkpointed { flowtape_engine::checkpoint(&[&x], block)? } else { block(&[x])? };
        let gradients = tape.backward(&y[0].square()?.sum_all()?)?;
        root.params().iter().map(|p| gradients.of(p).unwrap().to_vec()).collect()
    };
    assert_eq!(run(true)?, run(false)?);
    // What is differentiated outside must come in as an input.
    let tape = Tape::new();
    let (x, outside) = (tape.attach(&x), tape.leaf(&mask));
    assert!(flowtape_engine::checkpoint(&[&x], move |xs| Ok(vec![xs[0].mul(&outside)?])).is_err());
    Ok(())
}

/// Notes which gradients come, in which order, against what is left of the tape.
#[derive(Default)]
struct Order(Vec<VarId>);

impl GradientSink for Order {
    fn gradient(&mut self, var: VarId, _: Tensor) -> Result<()> {
        self.0.push(var);
        Ok(())
    }
}

#[test]
fn gradients_of_what_a_checkpointed_block_captures_are_final_with_its_replay() -> Result<()> {
    let mut draw = Draw::new(4);
    let root = ParamBuilder::new(0, DType::F32, &Device::cpu());
    let layers = (0..3).map(|i| Linear::new(&root.sub(i), 6, 6, false)).collect::<Result<Vec<_>>>()?;
    let tape = Tape::new();
    let mut x = tape.attach(&draw.standard(&[2, 6])?.to_dtype(DType::F32)?);
    for layer in &layers {
        let layer = layer.clone();
        // One block inside another: the outer one hears of both.
        let block = move |xs: &[Tensor]| {
            let layer = layer.clone();
            flowtape_engine::checkpoint(&[&xs[0]], move |xs| Ok(vec![layer.forward(&xs[0])?]))
        };
        x = flowtape_engine::checkpoint(&[&x], block)?.remove(0);
    }
    let loss = x.square()?.sum_all()?;
    let mut order = Order::default();
    tape.backward_with(&[(&loss, &Tensor::ones(&[], DType::F32, &Device::cpu())?)], &mut order)?;
    let params = root.params();
    let backwards: Vec<VarId> = params.iter().rev().filter_map(Param::var).collect();
    assert_eq!(order.0, backwards);
    Ok(())
}

#[test]
fn bad_input_is_an_error_that_says_what() -> Result<()> {
    let device = Device::cpu();
    let t = |dims: &[usize]| Tensor::ones(dims, DType::F32, &device);
    let message = |r: Result<Tensor>| r.unwrap_err().to_string();
    assert!(message(t(&[2, 3])?.add(&t(&[4])?)).contains("[2, 3]"));
    assert!(message(t(&[2, 3])?.matmul(&t(&[2, 3])?)).starts_with("matmul: expected shape"));
    assert!(message(ops::linear(&t(&[2, 3])?, &t(&[5, 4])?, None)).contains("weight [out, in]"));
    assert!(message(t(&[2, 3])?.sum(&[2], false)).contains("axis"));
    assert!(message(t(&[2, 3])?.reshape(&[4])).contains("[4]"));
    assert!(message(t(&[2, 3])?.narrow(1, 2, 2)).contains("0..3"));
    assert!(message(t(&[2, 3])?.matmul(&t(&[3, 3])?.to_dtype(DType::BF16)?)).contains("bf16"));
    assert!(
        message(ops::attention(&t(&[1, 1, 2, 4])?, &t(&[1, 2, 2, 4])?, &t(&[1, 1, 2, 4])?, None, None))
            .contains("[1, 2, 2, 4]")
    );
    let far = Tensor::from_slice(&[7u32], &[1], &device)?;
    assert!(message(t(&[2, 3])?.index_select(0, &far)).contains("below 2"));
    assert!(t(&[2])?.item().unwrap_err().to_string().contains("one element"));
    assert!(Tensor::from_slice(&[1f32], &[2], &device).is_err());
    Ok(())
}

/// What an input of an operation is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Role {
    Leaf,
    Parameter,
    Constant,
}

/// Runs a case with inputs of these roles and compares the gradients with those of a run where all are leaves. Whether it
/// was recorded: the other way is an error that says that a gradient would be lost.
fn same_gradients(case: &Case, seed: u64, role: impl Fn(usize) -> Role) -> Result<bool> {
    let sample = (case.make)(&mut Draw::new(seed))?;
    let gradients = |role: &dyn Fn(usize) -> Role| -> Result<Vec<Option<Vec<f64>>>> {
        let (tape, root) = (Tape::new(), ParamBuilder::new(0, DType::F64, &Device::cpu()));
        let make = |(i, value): (usize, &Tensor)| match role(i) {
            Role::Leaf => Ok(tape.leaf(value)),
            Role::Constant => Ok(value.clone()),
            Role::Parameter => {
                let parameter = root.get(&i.to_string(), value.dims(), Init::Zeros)?;
                parameter.copy_from(value)?;
                parameter.value()
            }
        };
        let inputs = sample.inputs.iter().enumerate().map(make).collect::<Result<Vec<_>>>()?;
        let y = (sample.run)(&inputs)?;
        // Only here does the tape come in where no input is on it.
        let weights = Draw::new(seed + 1).standard(y.dims())?;
        let loss = tape.attach(&weights).mul(&y)?.sum_all()?;
        if loss.var().is_none() {
            assert!((0..inputs.len()).all(|i| role(i) == Role::Constant));
            return Ok(vec![None; inputs.len()]);
        }
        let gradients = tape.backward(&loss)?;
        inputs.iter().map(|t| gradients.of(t).map(Tensor::to_vec::<f64>).transpose()).collect()
    };
    let expected = gradients(&|_| Role::Leaf)?;
    let got = match gradients(&role) {
        Err(Error::Unrecorded { .. }) => return Ok(false),
        other => other?,
    };
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let what = format!("{}, seed {seed}, input {i}, a {:?}", case.name, role(i));
        match (got, expected) {
            (None, _) => assert!(role(i) == Role::Constant, "{what} has none"),
            // A parameter lies dense in memory where a leaf may be a view, so sums may be of another order.
            (Some(got), Some(expected)) => {
                let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-11 * (1.0 + b.abs());
                assert!(got.iter().zip(expected).all(close), "{what}: {got:?} instead of {expected:?}");
            }
            (Some(_), None) => panic!("{what} has one"),
        }
    }
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_gradient_is_lost_whatever_stands_where(seed in 0u64..1 << 32, roles in prop::collection::vec(0usize..3, 8)) {
        for case in ops::cases() {
            same_gradients(case, seed, |i| [Role::Leaf, Role::Parameter, Role::Constant][roles[i % 8]]).unwrap();
        }
    }
}

#[test]
fn operations_on_parameters_alone_are_recorded_before_any_input() -> Result<()> {
    for case in ops::cases().filter(|case| !case.name.contains("rope")) {
        let recorded = same_gradients(case, 7, |_| Role::Parameter)?;
        // These bring constants of their own, which is an error then.
        let constants = [
            "dropout",
            "attention with masks, some rows fully masked",
            "index_select and embedding",
            "relative_position_bias",
            "resize_linear",
        ];
        assert!(recorded || constants.contains(&case.name), "{}", case.name);
    }
    Ok(())
}

#[test]
fn what_parameters_make_may_be_read_in_several_checkpointed_blocks() -> Result<()> {
    let mut draw = Draw::new(2);
    let x = draw.standard(&[3, 4])?;
    let run = |checkpointed: bool| -> Result<Vec<f64>> {
        let root = ParamBuilder::new(3, DType::F64, &Device::cpu());
        let w = root.get("w", &[4, 4], Init::Normal { std: 1.0 })?;
        let (tape, shared) = (Tape::new(), w.value()?.t()?.mul(&w.value()?)?);
        let mut h = tape.attach(&x);
        for _ in 0..2 {
            let inner = shared.clone();
            let block = move |xs: &[Tensor]| Ok(vec![xs[0].matmul(&inner)?.tanh()?]);
            h = if checkpointed { flowtape_engine::checkpoint(&[&h], block)? } else { block(&[h])? }.remove(0);
        }
        let loss = h.mul(&shared.narrow(0, 0, 3)?)?.sum_all()?;
        tape.backward(&loss)?.of(&w).unwrap().to_vec()
    };
    let (plain, replayed) = (run(false)?, run(true)?);
    assert!(plain.iter().zip(&replayed).all(|(a, b)| (a - b).abs() < 1e-12), "{plain:?} {replayed:?}");
    Ok(())
}

#[test]
fn gradients_that_meet_are_summed_in_f32() -> Result<()> {
    for (dtype, wide) in
        [(DType::BF16, DType::F32), (DType::F16, DType::F32), (DType::F32, DType::F32), (DType::F64, DType::F64)]
    {
        let root = ParamBuilder::new(0, dtype, &Device::cpu());
        let w = root.get("w", &[2], Init::Ones)?;
        // Micro-batches.
        let mut all = Gradients::default();
        for _ in 0..1000 {
            all.add(Tape::new().backward(&w.value()?.sum_all()?)?)?;
        }
        let sum = all.of(&w).unwrap();
        assert_eq!((sum.to_vec::<f64>()?, sum.dtype()), (vec![1000.0; 2], wide), "{dtype}");
        // Several uses of one parameter.
        let tape = Tape::new();
        let outputs = (0..1000).map(|_| tape.attach(&w.value()?).neg()).collect::<Result<Vec<_>>>()?;
        let one = Tensor::ones(&[2], dtype, &Device::cpu())?;
        let mut gradients = Gradients::default();
        tape.backward_with(&outputs.iter().map(|y| (y, &one)).collect::<Vec<_>>(), &mut gradients)?;
        assert_eq!(gradients.of(&w).unwrap().to_vec::<f64>()?, [-1000.0; 2], "{dtype}");
    }
    Ok(())
}
