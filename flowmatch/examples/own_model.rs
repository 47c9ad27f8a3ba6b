//! A model of one's own behind an adapter of one's own: it learns where its data lie, and samples from there.
//!
//! All data are the point c, so that x_t = (1 - σ) c + σ ε and the velocity ε - c is (x_t - c) / σ. The model has that
//! form; c is what it learns, from the pipeline's loss alone.
#![allow(clippy::print_stdout)] // an example shows what it does

use flowtape_engine::{DType, Device, Tape, Tensor};
use flowtape_flowmatch::{
    Batch, DataType, Draws, EulerConfig, FlowMatchEulerDiscrete, FlowMatchingConfig, FlowMatchingContext,
    FlowMatchingPipeline, FlowModel, ModelAdapter, ModelInputs, ModelOutput, PhiloxDraws, Result, Sampling,
    StepOptions, TaskType,
};

/// `v = (x - c) / σ`, with `c` of shape `[1, 2, 1, 1]`.
struct PointModel {
    c: Tensor,
}

impl FlowModel for PointModel {
    fn forward(&self, inputs: &ModelInputs) -> Result<ModelOutput> {
        let distance = inputs.tensor("x")?.sub(&self.c)?;
        Ok(distance.div(inputs.tensor("sigma")?)?.into())
    }
}

struct PointAdapter;

impl ModelAdapter for PointAdapter {
    fn name(&self) -> &str {
        "point"
    }

    fn prepare_inputs(&self, cx: &FlowMatchingContext<'_>, _: &mut dyn Draws) -> Result<ModelInputs> {
        let sigma = cx.sigma.reshape(&[cx.sigma.numel(), 1, 1, 1])?;
        Ok(ModelInputs::new().with("x", cx.noisy_latents.clone()).with("sigma", sigma))
    }
}

fn main() -> Result<()> {
    let cpu = Device::cpu();
    let data = Tensor::from_slice(&[3.0f32, -1.0].repeat(64), &[64, 2, 1, 1], &cpu)?;
    let batch = Batch::new(data, DataType::Image);
    // Near σ = 0 the velocity of this form grows without bound.
    let config = FlowMatchingConfig { sigma_min: 0.2, use_loss_weighting: false, ..Default::default() };
    let pipeline = FlowMatchingPipeline::new(config, PointAdapter)?;
    let mut draws = PhiloxDraws::new(1);
    let mut c = Tensor::zeros(&[1, 2, 1, 1], DType::F32, &cpu)?;
    for step in 0..200 {
        let tape = Tape::new();
        let model = PointModel { c: tape.leaf(&c) };
        let out = pipeline.step(&model, &batch, step, &mut draws, &StepOptions::recorded(&tape))?;
        if let Some(gradient) = tape.backward(&out.loss)?.of(&model.c) {
            c = c.sub(&gradient.mul_scalar(0.1)?)?;
        }
        if step % 50 == 0 {
            println!("step {step:3}  loss {:9.6}  c {:?}", out.loss.item()?, c.to_vec::<f32>()?);
        }
    }
    let euler = FlowMatchEulerDiscrete::new(EulerConfig::default())?;
    let model = PointModel { c };
    let (adapter, task_type) = (pipeline.adapter(), TaskType::T2V);
    let sampling = Sampling { adapter, model: &model, batch: &batch, task_type, guidance: None };
    let sample = euler.sample(&sampling, &draws.noise(&[64, 2, 1, 1], &cpu)?, &euler.set_timesteps(10, None)?)?;
    println!("sampled {:?}", sample.narrow(0, 0, 1)?.to_vec::<f32>()?);
    Ok(())
}
