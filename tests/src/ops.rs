//! Goldens of single operations and blocks: `ops/`. Value and gradients for a fixed cotangent.

use std::collections::BTreeMap;
use std::path::Path;

use flowtape_engine::nn::{
    Activation, FeedForward, LayerNorm, ParamBuilder, Params, RmsNorm, TimestepEmbedding, TimestepProjection,
    timestep_embedding,
};
use flowtape_engine::ops::{self, RopeLayout};
use flowtape_engine::{DType, Device, Tape, Tensor};
use flowtape_flowmatch::ModelInputs;
use flowtape_models::blocks::{
    ChannelOrder, CombinedTimestepTextProjEmbeddings, JointTokens, JointTransformerBlock, Modulation, QkvConfig,
    RopePrecision, RopeTables, Tokens, unpatchify,
};
use flowtape_models::flux::FluxSingleTransformerBlock;
use flowtape_models::flux2;
use flowtape_models::qwen_image::QwenImageConfig;
use flowtape_models::wan::{WanAttention, WanConfig};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, number, text};

/// One case while it runs.
struct Case<'a> {
    json: &'a Value,
    /// Dims of the first output, where a case does not state a size of its own.
    out: Vec<usize>,
    name: &'a str,
    inputs: BTreeMap<String, Tensor>,
    root: ParamBuilder,
    params: BTreeMap<String, Tensor>,
    /// Complex tables `[L, pairs, 2]` of another case that this one takes.
    freqs: Option<Tensor>,
}

/// Tables as complex numbers `[L, pairs, 2]`.
fn complex(tables: &RopeTables) -> Any<Tensor> {
    let halved = |table: &Tensor| -> Any<Tensor> {
        let (len, width) = (table.dim(0)?, table.dim(1)?);
        Ok(table.reshape(&[len, width / 2, 2])?.narrow(2, 0, 1)?)
    };
    Ok(Tensor::cat(&[&halved(&tables.cos)?, &halved(&tables.sin)?], 2)?)
}

/// A file of operations.
pub(crate) fn check(dir: &Path, file: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, file)?;
    for json in golden.list("cases")? {
        let name = text(json, "name")?;
        let tape = Tape::new();
        let inputs = golden.under(&format!("{name}/in."))?;
        let first = [format!("{name}/out"), format!("{name}/out.0")];
        let out_name = first.iter().find(|n| golden.has(n)).ok_or_else(|| format!("{name}: no output"))?;
        let case = Case {
            json,
            out: golden.tensor(out_name)?.dims().to_vec(),
            name,
            inputs: inputs
                .into_iter()
                .map(|(k, t)| {
                    let differentiated = golden.has(&format!("{name}/grad.{k}"));
                    let input = if differentiated { tape.leaf(&t) } else { tape.attach(&t) };
                    (k, input)
                })
                .collect(),
            root: ParamBuilder::new(0, DType::F32, &Device::cpu()),
            params: golden.under(&format!("{name}/param."))?,
            freqs: json["freqs"].as_str().map(|freqs| golden.tensor(freqs)).transpose()?,
        };
        let Some(outputs) = case.run()? else {
            out.push(Outcome::not_built(name));
            continue;
        };
        let numbered = |kind: &str, i: usize| match golden.has(&format!("{name}/{kind}")) {
            true => format!("{name}/{kind}"),
            false => format!("{name}/{kind}.{i}"),
        };
        let (mut loss, tolerance) = (None::<Tensor>, golden.tolerance("out")?);
        for (i, got) in outputs.iter().enumerate() {
            let want = golden.tensor(&numbered("out", i))?;
            if got.dims() != want.dims() {
                return Err(format!("{name}: shape {:?} instead of {:?}", got.dims(), want.dims()).into());
            }
            let case = if outputs.len() == 1 { name.to_owned() } else { format!("{name}.{i}") };
            let outcome = tolerance.tensor(case, got, &want)?;
            out.push(if name.starts_with("timesteps") {
                angles(outcome, json, &golden.values(&format!("{name}/in.t"))?, got, &want)?
            } else {
                outcome
            });
            if golden.has(&numbered("cotangent", i)) {
                let term = got.mul(&golden.tensor(&numbered("cotangent", i))?)?.sum_all()?;
                loss = Some(loss.map_or(Ok(term.clone()), |l| l.add(&term))?);
            }
        }
        let Some(loss) = loss else { continue };
        let gradients = tape.backward(&loss)?;
        let tolerance = golden.tolerance("grad")?;
        let params = case.root.params();
        for (key, want) in golden.under(&format!("{name}/grad."))? {
            let got = match key.strip_prefix("param.") {
                Some(parameter) => params.get(parameter).and_then(|p| gradients.of(p)),
                None => case.inputs.get(&key).and_then(|t| gradients.of(t)),
            };
            let got = got.ok_or_else(|| format!("{name}: no gradient of {key}"))?;
            out.push(tolerance.tensor(format!("{name} grad {key}"), got, &want)?);
        }
    }
    Ok(())
}

/// A sine of an angle that f32 holds to an ulp can be off by that ulp, as the case's note says: the bound is absolute.
fn angles(outcome: Outcome, json: &Value, times: &[f32], got: &Tensor, want: &Tensor) -> Any<Outcome> {
    let scale = json["scale"].as_f64().unwrap_or(1.0);
    let largest = times.iter().fold(0.0, |m: f64, t| m.max(f64::from(t.abs()) * scale));
    let worst = got.sub(want)?.to_vec::<f64>()?.into_iter().fold(0.0, |m: f64, d| m.max(d.abs()));
    Ok(Outcome::measured(outcome.case, worst, largest * 2f64.powi(-23), format!("{} (absolute)", outcome.detail)))
}

impl Case<'_> {
    fn input(&self, name: &str) -> Any<&Tensor> {
        self.inputs.get(name).ok_or_else(|| format!("{}: no input {name}", self.name).into())
    }

    /// The first of the names under which the files know an input.
    fn x(&self) -> Any<&Tensor> {
        self.input("x").or_else(|_| self.input("input"))
    }

    /// The axis `dim`; negative ones count from the end.
    fn axis(&self) -> Any<usize> {
        let dim = self.json["dim"].as_i64().ok_or("no dim")?;
        Ok((if dim < 0 { dim + self.x()?.rank() as i64 } else { dim }) as usize)
    }

    fn sizes(&self, key: &str) -> Any<Vec<usize>> {
        Ok(serde_json::from_value(self.json[key].clone())?)
    }

    /// Sets the parameters of a module that was just built.
    fn fill(&self, params: &Params) -> Any<()> {
        for parameter in params.iter() {
            let name = parameter.path();
            parameter.copy_from(self.params.get(name).ok_or_else(|| format!("{}: no param {name}", self.name))?)?;
        }
        (params.len() == self.params.len())
            .then_some(())
            .ok_or_else(|| format!("{}: parameters differ", self.name).into())
    }

    /// Builds a module, sets its parameters and runs it.
    fn module<M>(
        &self,
        build: impl FnOnce(&ParamBuilder) -> flowtape_engine::Result<M>,
        run: impl FnOnce(&M) -> flowtape_engine::Result<Vec<Tensor>>,
    ) -> Any<Vec<Tensor>> {
        let module = build(&self.root)?;
        self.fill(&self.root.params())?;
        Ok(run(&module)?)
    }

    /// Runs the case; `None` when its subject is not built.
    fn run(&self) -> Any<Option<Vec<Tensor>>> {
        let family = |prefix: &str| self.name.starts_with(prefix);
        let outputs = match self.name {
            _ if family("linear_") => {
                vec![ops::linear(self.x()?, self.input("weight")?, self.inputs.get("bias"))?]
            }
            "matmul_vec" => {
                let (a, v) = (self.x()?, self.input("other")?);
                let y = a.matmul(&v.unsqueeze(1)?)?;
                vec![y.squeeze(y.rank() - 1)?]
            }
            _ if family("matmul_") => vec![self.x()?.matmul(self.input("other")?)?],
            "add_broadcast" => vec![self.x()?.add(self.input("other")?)?],
            "mul_broadcast" => vec![self.x()?.mul(self.input("other")?)?],
            "div_broadcast" => vec![self.x()?.div(self.input("other")?)?],
            "mean_all" => vec![self.x()?.mean_all()?],
            "mean_dim" => vec![self.x()?.mean(&[self.axis()?], self.json["keepdim"] == true)?],
            "sum_dims" => vec![self.x()?.sum(&self.sizes("dim")?, false)?],
            "mse_loss_none" => vec![self.x()?.sub(self.input("target")?)?.square()?],
            "cat_dim1" => vec![Tensor::cat(&[self.input("x")?, self.input("y")?], 1)?],
            "chunk3_last_dim" => self.x()?.chunk(3, self.x()?.rank() - 1)?,
            "permute_reshape_6d" => vec![self.x()?.permute(&self.sizes("permute")?)?.reshape(&self.sizes("reshape")?)?],
            "embedding" => {
                vec![ops::embedding(self.input("weight")?, &self.input("index")?.detach().to_dtype(DType::U32)?)?]
            }
            _ if family("pow_") => vec![match number(self.json, "exponent")? {
                2.0 => self.x()?.square()?,
                0.5 => self.x()?.sqrt()?,
                _ => return Ok(None),
            }],
            "exp" => vec![self.x()?.exp()?],
            "sin" => vec![self.x()?.sin()?],
            "cos" => vec![self.x()?.cos()?],
            "tanh" => vec![self.x()?.tanh()?],
            "sigmoid" => vec![self.x()?.sigmoid()?],
            "rsqrt" => vec![self.x()?.rsqrt()?],
            "silu" => vec![Activation::Silu.forward(self.x()?)?],
            "gelu_exact" => vec![Activation::Gelu.forward(self.x()?)?],
            "gelu_tanh" => vec![Activation::GeluTanh.forward(self.x()?)?],
            _ if family("softmax") => vec![ops::softmax(self.x()?, self.axis()?)?],
            "diffusers_rms_norm" => self.norm(RmsNorm::new, RmsNorm::forward)?,
            "diffusers_fp32_layer_norm" => {
                self.norm(|p, n, eps| LayerNorm::new(p, n, eps, true), LayerNorm::forward)?
            }
            _ if family("layer_norm") => {
                let eps = number(self.json, "eps")?;
                vec![ops::layer_norm(self.x()?, self.inputs.get("weight"), self.inputs.get("bias"), eps)?]
            }
            _ if family("rms_norm") => {
                vec![ops::rms_norm(self.x()?, self.inputs.get("weight"), number(self.json, "eps")?)?]
            }
            _ if family("sdpa") => self.attention()?,
            _ if family("timesteps") => self.timesteps()?,
            _ if family("timestep_embedding") => self.embedder("sample", Activation::Silu)?,
            "pixart_text_projection_silu" => self.embedder("caption", Activation::Silu)?,
            "pixart_text_projection_gelu_tanh" => self.embedder("caption", Activation::GeluTanh)?,
            _ if family("flux_time") => self.flux_time()?,
            _ if family("conv3d_patchify") => {
                vec![ops::patchify_conv(self.x()?, self.input("weight")?, self.inputs.get("bias"))?]
            }
            "wan_unpatchify" | "hunyuan_unpatchify" => {
                let order = if family("wan") { ChannelOrder::Fastest } else { ChannelOrder::Slowest };
                vec![unpatchify(self.x()?, &self.sizes("grid")?, &self.sizes("patch")?, order)?]
            }
            "wan_rope" => {
                let config = WanConfig {
                    attention_head_dim: self.json["attention_head_dim"].as_u64().ok_or("a head dim")? as usize,
                    ..WanConfig::default()
                };
                let patch = self.sizes("patch_size")?;
                let grid: Vec<usize> = self.sizes("latent_fhw")?.iter().zip(patch).map(|(size, p)| size / p).collect();
                let tables = config.rope(&grid, &Device::cpu())?;
                let dims = [1, tables.cos.dim(0)?, 1, config.attention_head_dim];
                vec![tables.cos.reshape(&dims)?, tables.sin.reshape(&dims)?]
            }
            "hunyuan15_rope" => {
                let tables = RopeTables::of_grid(
                    &self.sizes("latent_fhw")?,
                    &self.sizes("rope_dim_thw")?,
                    number(self.json, "theta")?,
                    RopePrecision::F32,
                    &Device::cpu(),
                )?;
                vec![tables.cos, tables.sin]
            }
            "wan_self_attention" => self.wan_attention()?,
            _ if family("ada_layer_norm") => self.ada_layer_norm()?,
            _ if family("feed_forward") => self.feed_forward()?,
            "flux2_feed_forward" => {
                let inner = self.params.get("linear_out.weight").ok_or("a weight")?.dim(1)?;
                let x = self.x()?;
                self.module(|p| flux2::feed_forward(p, x.dim(2)?, inner), |m| Ok(vec![m.forward(x)?]))?
            }
            "flux2_modulation" => {
                let emb = self.input("emb")?;
                let (width, parts) = (emb.dim(1)?, self.out[1] / emb.dim(1)?);
                let build = |p: &ParamBuilder| Modulation::with(&p.sub("linear"), width, parts, false);
                self.module(build, |m| Ok(vec![m.together(emb)?.squeeze(1)?]))?
            }
            "flux_double_block" | "flux_single_block" => self.flux_block()?,
            "freqs_1d_f64" | "flux_pos_embed" | "flux2_pos_embed" => {
                let positions = self.inputs.values().next().ok_or("positions")?.to_vec::<f32>()?;
                let axes = match self.json["dim"].as_u64() {
                    Some(dim) => vec![dim as usize],
                    None => self.sizes("axes_dim")?,
                };
                let tables = RopeTables::new(
                    &positions,
                    &axes,
                    number(self.json, "theta")?,
                    RopePrecision::F64,
                    &Device::cpu(),
                )?;
                vec![tables.cos, tables.sin]
            }
            "qwen_rope" | "qwen_rope_two_images" => {
                let shapes: Vec<Vec<Vec<usize>>> = serde_json::from_value(self.json["img_shapes"].clone())?;
                let images = shapes.first().ok_or("shapes")?;
                let text = number(self.json, "text_len")? as usize;
                let axes_dims_rope = self.sizes("axes_dim")?;
                let config = QwenImageConfig { axes_dims_rope, ..QwenImageConfig::default() };
                let tables = config.rope(text, images, &Device::cpu())?;
                let places = tables.cos.dim(0)? - text;
                let complex = complex(&tables)?;
                vec![complex.narrow(0, text, places)?, complex.narrow(0, 0, text)?]
            }
            "qwen_apply" => {
                // Both numbers of a complex one at both places of their pair.
                let table = |i: usize| -> Any<Tensor> {
                    let part = self.freqs.as_ref().ok_or("freqs")?.narrow(2, i, 1)?;
                    let (len, pairs) = (part.dim(0)?, part.dim(1)?);
                    Ok(part.expand(&[len, pairs, 2])?.reshape(&[len, 2 * pairs])?)
                };
                let x = self.x()?.transpose(1, 2)?;
                vec![ops::rope(&x, &table(0)?, &table(1)?, RopeLayout::Interleaved)?.transpose(1, 2)?]
            }
            "flux_apply" => {
                let x = self.x()?.transpose(1, 2)?;
                vec![ops::rope(&x, self.input("cos")?, self.input("sin")?, RopeLayout::Interleaved)?.transpose(1, 2)?]
            }
            _ => return Ok(None),
        };
        Ok(Some(outputs))
    }

    fn norm<M>(
        &self,
        build: impl FnOnce(&ParamBuilder, usize, f64) -> flowtape_engine::Result<M>,
        run: impl FnOnce(&M, &Tensor) -> flowtape_engine::Result<Tensor>,
    ) -> Any<Vec<Tensor>> {
        let (x, eps) = (self.x()?, number(self.json, "eps")?);
        let width = x.dim(x.rank() - 1)?;
        self.module(|p| build(p, width, eps), |m| Ok(vec![run(m, x)?]))
    }

    fn attention(&self) -> Any<Vec<Tensor>> {
        let mask = match self.inputs.get("attn_mask") {
            // Booleans are stored as 0 and 1: kept keys.
            Some(mask) if !self.name.contains("additive") => Some(mask.detach().to_dtype(DType::U32)?),
            other => other.map(Tensor::detach),
        };
        let [q, k, v] = ["query", "key", "value"].map(|n| self.input(n));
        Ok(vec![ops::attention(q?, k?, v?, mask.as_ref(), self.json["scale"].as_f64())?])
    }

    fn timesteps(&self) -> Any<Vec<Tensor>> {
        let flips = !self.name.contains("noflip") && self.json["flip_sin_to_cos"] != false;
        let shift = if self.name.contains("shift1") { 1.0 } else { 0.0 };
        let options = TimestepProjection {
            dim: self.out[1],
            flip_sin_to_cos: flips,
            downscale_freq_shift: self.json["downscale_freq_shift"].as_f64().unwrap_or(shift) as f32,
            scale: self.json["scale"].as_f64().unwrap_or(1.0) as f32,
        };
        Ok(vec![timestep_embedding(self.input("t")?, &options)?])
    }

    fn embedder(&self, input: &str, activation: Activation) -> Any<Vec<Tensor>> {
        let x = self.input(input)?;
        let width = self.params.get("linear_1.weight").ok_or("a weight")?.dim(0)?;
        let (inputs, bias) = (x.dim(x.rank() - 1)?, self.params.contains_key("linear_1.bias"));
        self.module(|p| TimestepEmbedding::with(p, inputs, width, activation, bias), |m| Ok(vec![m.forward(x)?]))
    }

    fn wan_attention(&self) -> Any<Vec<Tensor>> {
        let x = self.x()?;
        let (heads, head_dim) = (number(self.json, "heads")? as usize, number(self.json, "dim_head")? as usize);
        let table = |name: &str| -> flowtape_engine::Result<Tensor> {
            self.inputs[name].detach().reshape(&[x.dim(1)?, head_dim])
        };
        let rope = RopeTables { cos: table("cos")?, sin: table("sin")?, layout: RopeLayout::Interleaved };
        self.module(
            |p| WanAttention::new(p, heads * head_dim, heads, 1e-6, None),
            |m| Ok(vec![m.self_attention(x, &Tokens::whole(), &rope)?]),
        )
    }

    fn flux_time(&self) -> Any<Vec<Tensor>> {
        let (timestep, pooled) = (self.input("timestep")?, self.input("pooled")?);
        let guidance = self.inputs.get("guidance");
        let width = self.params.get("text_embedder.linear_1.bias").ok_or("a bias")?.numel();
        self.module(
            |p| CombinedTimestepTextProjEmbeddings::new(p, width, pooled.dim(1)?, guidance.is_some()),
            |m| {
                let project = |times: &Tensor| timestep_embedding(times, &TimestepProjection::new(256));
                let guidance = guidance.map(project).transpose()?;
                Ok(vec![m.forward(&project(timestep)?, guidance.as_ref(), pooled)?])
            },
        )
    }

    fn ada_layer_norm(&self) -> Any<Vec<Tensor>> {
        let (x, emb) = (self.x()?, self.input("emb")?);
        let width = x.dim(2)?;
        let parts = self.params.get("linear.bias").ok_or("a bias")?.numel() / width;
        self.module(
            |p| Modulation::new(&p.sub("linear"), width, parts),
            |m| {
                let parts = m.forward(emb)?;
                let (shift, scale) = if parts.len() == 2 { (1, 0) } else { (0, 1) };
                let mut out = vec![ops::modulated_layer_norm(x, &parts[shift], &parts[scale], 1e-6)?];
                for part in &parts[2..] {
                    out.push(part.squeeze(1)?);
                }
                Ok(out)
            },
        )
    }

    fn feed_forward(&self) -> Any<Vec<Tensor>> {
        let x = self.x()?;
        let activation = match self.json["activation_fn"].as_str() {
            Some("gelu") => Activation::Gelu,
            Some("gelu-approximate") | None => Activation::GeluTanh,
            Some("geglu") => Activation::Geglu,
            Some("swiglu") => Activation::Swiglu,
            Some("linear-silu") => Activation::Silu,
            Some(other) => return Err(format!("unknown activation {other}").into()),
        };
        let inner = self.params.get("net.2.weight").ok_or("a weight")?.dim(1)?;
        self.module(|p| FeedForward::new(p, x.dim(2)?, inner, activation), |m| Ok(vec![m.forward(x)?]))
    }

    fn flux_block(&self) -> Any<Vec<Tensor>> {
        let [text, image, temb] = ["enc", "hidden", "temb"].map(|n| self.input(n));
        let (text, image, temb) = (text?, image?, temb?);
        let rope = RopeTables {
            cos: self.input("cos")?.detach(),
            sin: self.input("sin")?.detach(),
            layout: RopeLayout::Interleaved,
        };
        let (width, head) = (image.dim(2)?, rope.cos.dim(1)?);
        let (joint, _) = JointTokens::new(&ModelInputs::new(), [text.clone(), image.clone()], &rope, None)?;
        if self.name == "flux_double_block" {
            return self.module(
                |p| JointTransformerBlock::new(p, QkvConfig::joint(width, width / head), 4 * width),
                |m| Ok(m.forward([text, image], temb, &joint)?.into()),
            );
        }
        self.module(
            |p| FluxSingleTransformerBlock::new(p, width, width / head),
            |m| {
                let x = m.forward(&Tensor::cat(&[text, image], 1)?, temb, &joint)?;
                x.split(&[text.dim(1)?, image.dim(1)?], 1)
            },
        )
    }
}
