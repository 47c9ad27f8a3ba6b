//! A model of one's own in a program of one's own, on the engine and the pipeline alone: a small network learns where points lie (on a
//! ring), and Euler's method draws new ones from noise.
//! Run it by `cargo run --release -p flowtape-flowmatch --example own_model`.

use flowtape_engine::nn::{Linear, ParamBuilder};
use flowtape_engine::optim::{OptimizerConfig, Rates};
use flowtape_engine::{DType, Device, Philox, Tape, Tensor};
use flowtape_flowmatch::*;

/// Velocities of points, from where they are and how noisy: `[B, 3]` to `[B, 2, 1, 1]`.
struct Mlp(Vec<Linear>);

impl FlowModel for Mlp {
    fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
        let x = inputs.tensor("point")?;
        let mut h = self.0[0].forward(x)?;
        for layer in &self.0[1..] {
            h = layer.forward(&h.silu()?)?;
        }
        Ok(h.reshape(&[x.dim(0)?, 2, 1, 1])?.into())
    }
}

struct Points;

impl ModelAdapter for Points {
    fn name(&self) -> &str {
        "points"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        let n = cx.sigma.numel();
        let (x, sigma) = (cx.noisy_latents.reshape(&[n, 2])?, cx.sigma.reshape(&[n, 1])?);
        Ok(ModelInputs::new().with("point", Tensor::cat(&[&x, &sigma], 1)?))
    }
}

/// Trains, and draws some points.
pub fn ring(steps: u64, n: usize) -> Result<Vec<f32>> {
    let cpu = Device::cpu();
    let root = ParamBuilder::new(1, DType::F32, &cpu);
    let layer = |(i, w): (usize, &[usize])| Linear::new(&root.sub(i), w[0], w[1], true);
    let model = Mlp([3, 128, 128, 2].windows(2).enumerate().map(layer).collect::<Result<_, _>>()?);
    let config = FlowMatchingConfig { flow_shift: 1.0, use_loss_weighting: false, ..Default::default() };
    let pipeline = FlowMatchingPipeline::new(config, Points)?;
    let (mut random, mut draws, mut optimizer) =
        (Philox::new(2), PhiloxDraws::new(3), OptimizerConfig::default().build()?);
    for step in 0..steps {
        let angles = (0..256).map(|_| random.next_f64() * std::f64::consts::TAU);
        let points = angles.flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]);
        let batch = Batch::new(Tensor::from_vec(points.collect(), &[256, 2, 1, 1], &cpu)?, DataType::Image);
        let tape = Tape::new();
        let out = pipeline.step(&model, &batch, step, &mut draws, &StepOptions::recorded(&tape))?;
        optimizer.step(&root.params(), &tape.backward(&out.loss)?, Rates { lr: 3e-3, weight_decay: 0.0 }, None)?;
    }
    let noise = draws.noise(&[n, 2, 1, 1], &cpu)?;
    let batch = &Batch::new(noise.clone(), DataType::Image);
    let sampling = Sampling { adapter: &Points, model: &model, batch, task_type: TaskType::T2V, guidance: None };
    let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
    Ok(euler.sample(&sampling, &noise, &euler.set_timesteps(30, None)?)?.to_vec()?)
}

#[allow(clippy::print_stdout, dead_code)] // an example shows what it does
fn main() -> Result<()> {
    for point in ring(800, 8)?.chunks(2) {
        println!("({:6.3}, {:6.3}), radius {:.3}", point[0], point[1], f64::from(point[0]).hypot(point[1].into()));
    }
    Ok(())
}
