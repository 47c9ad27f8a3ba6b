//! The engine's operations one by one, against what the machine can do at best.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use flowtape_engine::backend::call::{Call, CopyTo};
use flowtape_engine::nn::{Init, ParamBuilder};
use flowtape_engine::ops::{self, ConvAxis, RopeLayout};
use flowtape_engine::optim::{AdamW, Optimizer, Rates};
use flowtape_engine::quant::{self, FORMATS, Format, QTensor};
use flowtape_engine::{DType, Device, Gradients, Philox, Tape, Tensor, cpu};
use flowtape_models::blocks;
use serde::Serialize;

use super::clock::{Clock, Times};
use crate::Result;

/// What is measured.
#[derive(Clone, Debug)]
pub struct OpsOptions {
    /// Where.
    pub device: Device,
    /// The device's name.
    pub device_name: String,
    /// Of the operands.
    pub dtype: DType,
    /// Sizes of FLUX.1 at 1024 x 1024 pixels, for GPUs, instead of those of the configurations of `bench step`.
    pub large: bool,
    /// Only operations whose name or sizes contain this.
    pub only: Option<String>,
    /// Seconds that each operation is measured for.
    pub seconds: f64,
    /// The device's peak in GFLOP/s, where it can't be measured: on all devices but the CPU.
    pub peak_gflops: Option<f64>,
}

/// What an operation takes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct OpMeasurement {
    /// The operation.
    pub op: String,
    /// Its sizes.
    pub shape: String,
    /// Of its operands.
    pub dtype: &'static str,
    /// Where it ran.
    pub device: String,
    /// Threads of the CPU.
    pub threads: usize,
    /// Calls that were measured.
    pub calls: usize,
    /// Seconds of a call in the fastest round.
    pub s_min: f64,
    /// Seconds of a call in the median round.
    pub s_median: f64,
    /// 10^9 floating-point operations a second in the fastest round, for matrix products, attention and convolutions. They are
    /// counted as the definition has them: a convolution by Winograd's transforms takes fewer, and may pass the peak so.
    pub gflops: Option<f64>,
    /// 10^9 bytes a second in the fastest round: each operand read or written once.
    pub gb_s: f64,
    /// Where the fraction's 1 is: `peak`, the most operations of the dtype in a second; `copy`, a copy of as many bytes; `dense`, the
    /// product of the weight as it was before it was quantised.
    pub limit: &'static str,
    /// The fraction of that limit, where the limit is known.
    pub fraction: Option<f64>,
}

/// Measures all operations; `report` gets each one as soon as it is measured.
///
/// # Errors
/// When the device fails or memory runs out.
pub fn ops(options: &OpsOptions, mut report: impl FnMut(&OpMeasurement)) -> Result<()> {
    let device = &options.device;
    let bench = Bench {
        options,
        clock: Clock::new(device, options.seconds)?,
        peak: match options.peak_gflops {
            None if device.backend().is_host() => Some(cpu::peak_flops(options.dtype)),
            given => given.map(|g| 1e9 * g),
        },
        copies: RefCell::default(),
        random: RefCell::new(Philox::new(3)),
    };
    let out = &mut report;
    bench.products(out)?;
    bench.quantised(out)?;
    bench.convolutions(out)?;
    bench.attention(out)?;
    bench.norms(out)?;
    bench.rope(out)?;
    bench.pointwise(out)?;
    bench.adamw(out)?;
    bench.copy(out)
}

type Report<'a> = &'a mut dyn FnMut(&OpMeasurement);

/// How much an operation does.
#[derive(Clone, Copy)]
enum Work {
    /// Floating-point operations, and bytes.
    Flops(f64, usize),
    /// Bytes alone.
    Bytes(usize),
    /// Floating-point operations, and bytes; the part of another way's speed.
    Beside(f64, usize, f64),
}

struct Bench<'a> {
    options: &'a OpsOptions,
    clock: Clock,
    /// Floating-point operations a second.
    peak: Option<f64>,
    /// Bytes a second of a copy, by the bytes that it reads and writes.
    copies: RefCell<BTreeMap<usize, f64>>,
    random: RefCell<Philox>,
}

fn sizes(dims: &[usize]) -> String {
    dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}

impl Bench<'_> {
    /// Random numbers.
    fn normal(&self, dims: &[usize]) -> Result<Tensor> {
        let drawn = self.random.borrow_mut().normal(dims, &self.options.device)?;
        Ok(drawn.to_dtype(self.options.dtype)?)
    }

    fn size(&self) -> usize {
        self.options.dtype.size()
    }

    /// Rows and width of activations.
    fn activations(&self) -> &'static [[usize; 2]] {
        if self.options.large {
            &[[4608, 3072], [4608, 12288]]
        } else {
            &[[1024, 256], [640, 768], [640, 3072], [16384, 1024]]
        }
    }

    fn wanted(&self, op: &str, shape: &str) -> bool {
        self.options.only.as_deref().is_none_or(|only| format!("{op} {shape}").contains(only))
    }

    fn tell(
        &self,
        (op, shape): (&str, String),
        work: Work,
        report: Report<'_>,
        measure: impl FnOnce(&Clock) -> Result<Times>,
    ) -> Result<()> {
        if !self.wanted(op, &shape) {
            return Ok(());
        }
        let Times { best, median, calls } = measure(&self.clock)?;
        let (limit, flops, bytes) = match work {
            Work::Flops(flops, bytes) => ("peak", Some(flops / best), bytes as f64 / best),
            Work::Bytes(bytes) => ("copy", None, bytes as f64 / best),
            Work::Beside(flops, bytes, _) => ("dense", Some(flops / best), bytes as f64 / best),
        };
        let fraction = match work {
            Work::Flops(flops, _) => self.peak.map(|peak| flops / best / peak),
            Work::Bytes(size) => Some(bytes / self.copy_rate(size)?),
            Work::Beside(.., fraction) => Some(fraction),
        };
        let digits = |value: f64| (value * 1e4).round() / 1e4;
        report(&OpMeasurement {
            op: op.into(),
            shape,
            dtype: self.options.dtype.name(),
            device: self.options.device_name.clone(),
            threads: rayon::current_num_threads(),
            calls,
            s_min: best,
            s_median: median,
            gflops: flops.map(|f| digits(f / 1e9)),
            gb_s: digits(bytes / 1e9),
            limit,
            fraction: fraction.map(digits),
        });
        Ok(())
    }

    /// An operation on tensors that are there.
    fn forward(
        &self,
        name: (&str, String),
        work: Work,
        report: Report<'_>,
        run: impl Fn() -> flowtape_engine::Result<Tensor>,
    ) -> Result<()> {
        self.tell(name, work, report, |clock| clock.measure(|| Ok(run().map(drop)?)))
    }

    /// The backward pass alone of `run`, which gets its inputs as leaves of a tape.
    fn backward(
        &self,
        name: (&str, String),
        work: Work,
        report: Report<'_>,
        inputs: &[Tensor],
        run: impl Fn(&[Tensor]) -> flowtape_engine::Result<Tensor>,
    ) -> Result<()> {
        if !self.wanted(name.0, &name.1) {
            return Ok(());
        }
        let cotangent = self.normal(run(inputs)?.dims())?;
        self.tell(name, work, report, |clock| {
            let prepare = || {
                let tape = Tape::new();
                let leaves: Vec<Tensor> = inputs.iter().map(|x| tape.leaf(x)).collect();
                let output = run(&leaves)?;
                Ok((tape, output))
            };
            clock.measure_prepared(prepare, |(tape, output)| {
                Ok(tape.backward_with(&[(&output, &cotangent)], &mut Gradients::default())?)
            })
        })
    }

    /// The products of a linear layer of `rows x in x out`: NT is `x W^T`, NN `dy W`, TN `dy^T x`.
    fn products(&self, report: Report<'_>) -> Result<()> {
        let all: &[[usize; 3]] = if self.options.large {
            &[[4096, 4096, 4096], [4096, 3072, 3072], [4096, 3072, 12288], [4608, 15360, 3072], [512, 3072, 12288]]
        } else {
            &[
                [1024, 256, 256],
                [1024, 256, 1024],
                [1280, 1280, 256],
                [640, 768, 768],
                [640, 768, 3072],
                [640, 3840, 768],
                [128, 768, 3072],
                [320, 1024, 1024],
                [320, 1024, 4096],
                [256, 4096, 1024],
                [64, 1024, 4096],
                [1152, 128, 128],
                [1152, 128, 512],
                [16, 256, 1536],
                [2, 768, 4608],
            ]
        };
        for &[rows, width, out] in all {
            let shape = sizes(&[rows, width, out]);
            let bytes = (rows * width + width * out + rows * out) * self.size();
            let work = Work::Flops(2.0 * (rows * width * out) as f64, bytes);
            if !["NT", "NN", "TN"].iter().any(|layout| self.wanted(&format!("matmul {layout}"), &shape)) {
                continue;
            }
            let (x, w, dy) = (self.normal(&[rows, width])?, self.normal(&[out, width])?, self.normal(&[rows, out])?);
            let (w_t, dy_t) = (w.t()?, dy.t()?);
            self.forward(("matmul NT", shape.clone()), work, report, || x.matmul(&w_t))?;
            self.forward(("matmul NN", shape.clone()), work, report, || dy.matmul(&w))?;
            self.forward(("matmul TN", shape), work, report, || dy_t.matmul(&x))?;
        }
        Ok(())
    }

    /// Linear layers of `rows x in x out` with a quantised weight beside the same with a dense one, in turns, forward and back to
    /// the input.
    fn quantised(&self, report: Report<'_>) -> Result<()> {
        let all: &[[usize; 3]] = if self.options.large {
            &[[512, 3072, 12288], [4096, 3072, 3072]]
        } else {
            &[[64, 1536, 1536], [512, 1536, 1536], [4096, 1536, 1536]]
        };
        for (&[rows, width, out], format) in all.iter().flat_map(|sizes| FORMATS.map(|format| (sizes, format))) {
            let name = match format {
                Format::Int8 => "linear int8",
                Format::Fp8 => "linear fp8",
                Format::Nf4 => "linear nf4",
            };
            let (shape, backward) = (sizes(&[rows, width, out]), format!("{name} backward"));
            if ![name, &backward].iter().any(|op| self.wanted(op, &shape)) {
                continue;
            }
            let (x, dy, dense) =
                (self.normal(&[rows, width])?, self.normal(&[rows, out])?, self.normal(&[out, width])?);
            let weight = Arc::new(QTensor::quantise(&dense, format, &self.options.device)?);
            let run = |side: usize, x: &Tensor| {
                if side == 0 { ops::linear(x, &dense, None) } else { quant::linear(x, &weight, None) }
            };
            let (flops, bytes) =
                (2.0 * (rows * width * out) as f64, (rows * width + rows * out) * self.size() + weight.bytes());
            let mut beside = |op: &str, turns: [(Times, Vec<f64>); 2]| {
                let [(_, dense), (times, own)] = turns;
                let mut ratios: Vec<f64> = dense.iter().zip(&own).map(|(dense, own)| dense / own).collect();
                ratios.sort_by(f64::total_cmp);
                let work = Work::Beside(flops, bytes, ratios[ratios.len() / 2]);
                self.tell((op, shape.clone()), work, &mut *report, |_| Ok(times))
            };
            if self.wanted(name, &shape) {
                let turns = self.clock.measure_in_turns(|_| Ok(()), |side, ()| Ok(run(side, &x).map(drop)?))?;
                beside(name, turns)?;
            }
            if self.wanted(&backward, &shape) {
                let prepare = |side: usize| {
                    let tape = Tape::new();
                    let y = run(side, &tape.leaf(&x))?;
                    Ok((tape, y))
                };
                let work =
                    |_, (tape, y): (Tape, Tensor)| Ok(tape.backward_with(&[(&y, &dy)], &mut Gradients::default())?);
                beside(&backward, self.clock.measure_in_turns(prepare, work)?)?;
            }
        }
        Ok(())
    }

    /// Convolutions of three taps a side, as autoencoders have them: channels, results, rows and columns; then the norm that
    /// stands before each.
    fn convolutions(&self, report: Report<'_>) -> Result<()> {
        let all: &[[usize; 4]] = if self.options.large {
            &[[512, 512, 128, 128], [512, 512, 256, 256], [256, 256, 512, 512], [128, 128, 1024, 1024]]
        } else {
            &[[512, 512, 32, 32], [512, 512, 64, 64], [256, 256, 128, 128], [128, 128, 256, 256], [16, 16, 64, 64]]
        };
        for &[channels, results, rows, columns] in all {
            let shape = sizes(&[channels, results, rows, columns]);
            let (places, taps) = (rows * columns, channels * results * 9);
            let work = Work::Flops(2.0 * (places * taps) as f64, (places * (channels + results) + taps) * self.size());
            let norm = Work::Bytes(2 * places * channels * self.size());
            let wanted = |op: &str| self.wanted(op, &shape);
            if !wanted("conv") && !wanted("group_norm_silu") {
                continue;
            }
            // Channels innermost, as convolutions leave their results.
            let x = self.normal(&[1, rows, columns, channels])?.permute(&[0, 3, 1, 2])?;
            let weight = self.normal(&[results, channels, 3, 3])?;
            let bias = self.normal(&[results])?;
            let axes = [ConvAxis::same(3); 2];
            self.forward(("conv", shape.clone()), work, report, || ops::conv(&x, &weight, Some(&bias), &axes, 1))?;
            let (scale, shift) = (self.normal(&[channels])?, self.normal(&[channels])?);
            let groups = 32.min(channels / 2);
            let run = || ops::group_norm_silu(&x, groups, &scale, &shift, 1e-6);
            self.forward(("group_norm_silu", shape), norm, report, run)?;
        }
        Ok(())
    }

    fn attention(&self, report: Report<'_>) -> Result<()> {
        let all: &[[usize; 4]] = if self.options.large {
            &[[1, 24, 4608, 128], [2, 24, 1536, 128]]
        } else {
            &[[2, 12, 320, 64], [16, 4, 80, 64], [1, 24, 1024, 128], [64, 4, 18, 32]]
        };
        for &[b, h, l, d] in all {
            let shape = sizes(&[b, h, l, d]);
            // Two products forward, five backward.
            let (product, operand) = (2.0 * (b * h * l * l * d) as f64, b * h * l * d * self.size());
            let inputs = [self.normal(&[b, h, l, d])?, self.normal(&[b, h, l, d])?, self.normal(&[b, h, l, d])?];
            let run = |x: &[Tensor]| ops::attention(&x[0], &x[1], &x[2], None, None);
            let forward = Work::Flops(2.0 * product, 4 * operand);
            self.forward(("attention", shape.clone()), forward, report, || run(&inputs))?;
            let backward = Work::Flops(5.0 * product, 8 * operand);
            self.backward(("attention backward", shape), backward, report, &inputs, run)?;
        }
        Ok(())
    }

    /// An operation of memory's speed forward and backward: forward reads the inputs and writes a result like the first;
    /// backward reads the inputs and the result's gradient, and writes the inputs' gradients.
    fn both(
        &self,
        op: &str,
        report: Report<'_>,
        inputs: &[Tensor],
        run: impl Fn(&[Tensor]) -> flowtape_engine::Result<Tensor>,
    ) -> Result<()> {
        let (shape, first) = (sizes(inputs[0].dims()), inputs[0].numel() * self.size());
        let all: usize = inputs.iter().map(|x| x.numel() * self.size()).sum();
        self.forward((op, shape.clone()), Work::Bytes(all + first), report, || run(inputs))?;
        self.backward((&format!("{op} backward"), shape), Work::Bytes(2 * all + first), report, inputs, run)
    }

    fn norms(&self, report: Report<'_>) -> Result<()> {
        for &[rows, width] in self.activations() {
            let x = self.normal(&[rows, width])?;
            self.both("layer_norm", report, &[x], |x| ops::layer_norm(&x[0], None, None, 1e-6))?;
        }
        let heads: &[[usize; 4]] =
            if self.options.large { &[[1, 4608, 24, 128]] } else { &[[2, 320, 12, 64], [16, 80, 4, 64]] };
        for &dims in heads {
            let inputs = [self.normal(&dims)?, self.normal(&dims[3..])?];
            self.both("rms_norm", report, &inputs, |x| ops::rms_norm(&x[0], Some(&x[1]), 1e-6))?;
        }
        Ok(())
    }

    fn rope(&self, report: Report<'_>) -> Result<()> {
        let all: &[[usize; 4]] =
            if self.options.large { &[[1, 24, 4608, 128]] } else { &[[2, 12, 320, 64], [16, 4, 80, 64]] };
        for dims in all {
            let angles = |seed| -> Result<Tensor> {
                let half = Philox::new(seed).normal(&[dims[2], dims[3] / 2, 1], &self.options.device)?;
                Ok(half.expand(&[dims[2], dims[3] / 2, 2])?.reshape(&dims[2..])?)
            };
            let (cos, sin) = (angles(5)?, angles(6)?);
            let x = self.normal(dims)?;
            let layout = RopeLayout::Interleaved;
            self.both("rope", report, &[x], |x| ops::rope(&x[0], &cos, &sin, layout))?;
            let x = self.normal(&[dims[0], dims[2], dims[1], dims[3]])?;
            let inputs = [x, self.normal(&dims[3..])?];
            self.both("rms_norm_rope", report, &inputs, |x| {
                ops::rms_norm_rope(&x[0], &x[1], 1e-6, &cos, &sin, layout)
            })?;
        }
        Ok(())
    }

    fn pointwise(&self, report: Report<'_>) -> Result<()> {
        for &[rows, width] in self.activations() {
            let x = self.normal(&[rows, width])?;
            self.both("gelu", report, &[x], |x| x[0].gelu())?;
            // Two samples: the vectors of the modulation are one for each.
            let dims = [2, rows / 2, width];
            let inputs = [self.normal(&dims)?, self.normal(&[2, 1, width])?, self.normal(&[2, 1, width])?];
            self.both("modulated_layer_norm", report, &inputs, |x| {
                ops::modulated_layer_norm(&x[0], &x[1], &x[2], 1e-6)
            })?;
            let inputs = [self.normal(&dims)?, self.normal(&[2, 1, width])?, self.normal(&dims)?];
            self.both("gate", report, &inputs, |x| blocks::gate(&x[0], &x[1], &x[2]))?;
        }
        Ok(())
    }

    /// One large parameter, and many small ones.
    fn adamw(&self, report: Report<'_>) -> Result<()> {
        for (count, numel) in [(1, 1 << 24), (100, 1 << 12)] {
            let shape = format!("{count} of {numel}");
            if !self.wanted("adamw", &shape) {
                continue;
            }
            let builder = ParamBuilder::new(0, self.options.dtype, &self.options.device);
            let mut gradients = Gradients::default();
            for i in 0..count {
                let parameter = builder.get(&i.to_string(), &[numel], Init::Normal { std: 1.0 })?;
                let gradient = self.normal(&[numel])?;
                parameter.var().into_iter().for_each(|var| gradients.insert(var, gradient.clone()));
            }
            let (params, mut optimizer) = (builder.params(), Optimizer::new(AdamW::default()));
            let rates = Rates { lr: 1e-4, weight_decay: 0.01 };
            // Parameter and two moments are read and written, the gradient is read.
            let work = Work::Bytes(7 * count * numel * self.size());
            self.tell(("adamw", shape), work, report, |clock| {
                clock.measure(|| Ok(optimizer.step(&params, &gradients, rates, None)?))
            })?;
        }
        Ok(())
    }

    fn copy(&self, report: Report<'_>) -> Result<()> {
        for bytes in [1 << 18, 1 << 22, 1 << 27] {
            let numel = bytes / 2 / self.size();
            let (from, to) = self.pair(numel)?;
            self.tell(("copy", numel.to_string()), Work::Bytes(bytes), report, |clock| {
                clock.measure(|| Ok(CopyTo { source: &from, target: &to }.run()?))
            })?;
        }
        Ok(())
    }

    /// Two vectors, the first with values.
    fn pair(&self, numel: usize) -> Result<(Tensor, Tensor)> {
        let (dtype, device) = (self.options.dtype, &self.options.device);
        Ok((Tensor::ones(&[numel], dtype, device)?, Tensor::zeros(&[numel], dtype, device)?))
    }

    /// Bytes a second of a copy that reads and writes `bytes` together.
    fn copy_rate(&self, bytes: usize) -> Result<f64> {
        if let Some(rate) = self.copies.borrow().get(&bytes) {
            return Ok(*rate);
        }
        let (from, to) = self.pair((bytes / 2 / self.size()).max(1))?;
        let times = self.clock.measure(|| Ok(CopyTo { source: &from, target: &to }.run()?))?;
        let rate = bytes as f64 / times.best;
        self.copies.borrow_mut().insert(bytes, rate);
        Ok(rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_measured_and_below_its_limits() {
        // On one thread: a share of a busy machine has its full rate for a while.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let options = OpsOptions {
                device: Device::cpu(),
                device_name: "cpu".into(),
                dtype,
                large: false,
                only: Some("64x".into()),
                seconds: 0.001,
                peak_gflops: None,
            };
            let mut all = Vec::new();
            pool.install(|| ops(&options, |m| all.push(m.clone()))).unwrap();
            for m in &all {
                assert!(m.s_min > 0.0 && m.s_min <= m.s_median && m.gb_s > 0.0 && m.calls > 0, "{m:?}");
                // A product can't be faster than the units; two measurements have some slack. Winograd's convolution takes 16
                // products where 36 are counted.
                let most = match (m.limit, &m.op[..]) {
                    ("peak", "conv") => 1.15 * 36.0 / 16.0,
                    ("peak", _) => 1.15,
                    _ => f64::INFINITY,
                };
                assert!(m.threads == 1 && m.fraction.is_some_and(|f| f > 0.0 && f < most), "{m:?}");
            }
            let names: Vec<&str> = all.iter().map(|m| &m.op[..]).collect();
            for name in [
                "matmul NT",
                "matmul NN",
                "matmul TN",
                "linear nf4",
                "linear nf4 backward",
                "conv",
                "attention",
                "attention backward",
            ] {
                assert!(names.contains(&name), "{name} in {names:?}");
            }
        }
    }
}
