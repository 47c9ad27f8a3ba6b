//! Philox4x32-10, four numbers a thread: the integers and uniforms of the CPU, bit for bit.

use std::f64::consts::TAU;

use flowtape_engine::Result;
use flowtape_engine::backend::Distribution;
use flowtape_engine::expr::{Function, Program};

use super::queue::{Gpu, Launch};
use super::view::{Access, View};
use super::wgsl::{self, THREADS};

const PHILOX: &str = "
fn high(a: u32, b: u32) -> u32 {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let ab = (a >> 16u) * (b & 0xffffu);
  let ba = (a & 0xffffu) * (b >> 16u);
  let middle = (low >> 16u) + (ab & 0xffffu) + (ba & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (ab >> 16u) + (ba >> 16u) + (middle >> 16u);
}
fn philox(counter: vec2<u32>, seed: vec2<u32>) -> vec4<u32> {
  var c = vec4<u32>(counter, 0u, 0u);
  var key = seed;
  for (var round = 0u; round < 10u; round++) {
    let p = high(c.x, 0xd2511f53u);
    let q = high(c.z, 0xcd9e8d57u);
    c = vec4<u32>(q ^ c.y ^ key.x, c.z * 0xcd9e8d57u, p ^ c.w ^ key.y, c.x * 0xd2511f53u);
    key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
  }
  return c;
}
fn unit(b: u32) -> f32 { return f32(b >> 8u) * 0x1p-24; }
";

/// Fills a contiguous view from a fresh block of the generator on.
pub(super) fn fill(gpu: &Gpu, distribution: Distribution, seed: u64, counter: u64, out: &View) -> Result<()> {
    let count = out.numel();
    let blocks = count.div_ceil(4);
    // Two normal numbers of two uniform ones; the first is moved off zero by half a step.
    let half_step = 0.5 / 16_777_216.0;
    let box_muller = Program::of(&Function::build(|[a, b]| {
        let (radius, angle) = (((a + half_step).log() * -2.0).sqrt(), b * TAU);
        [radius * angle.cos(), radius * angle.sin()]
    }));
    let words = |n: u64| [n as u32, (n >> 32) as u32];
    let params = [&[count as u32, blocks as u32], &words(seed)[..], &words(counter)[..]].concat();
    let launch = Launch {
        name: "random",
        shape: vec![distribution as u64],
        operands: &[(out, Access::Write)],
        params: &params,
        workgroups: blocks.div_ceil(THREADS),
    };
    gpu.launch(&launch, || {
        let [count, blocks, seed_low, seed_high, low, high] = std::array::from_fn(|i| wgsl::param(1 + i));
        let (values, put) = match distribution {
            Distribution::Bits => ("let v = r;", "put0"),
            Distribution::Uniform => ("let v = vec4<f32>(unit(r.x), unit(r.y), unit(r.z), unit(r.w));", "store0"),
            Distribution::Normal => (
                "let p = box_muller(unit(r.x), unit(r.y));
  let q = box_muller(unit(r.z), unit(r.w));
  let v = vec4<f32>(p[0], p[1], q[0], q[1]);",
                "store0",
            ),
        };
        let base = wgsl::param(0);
        let main = format!(
            "  let i = group * {THREADS}u + index;
  if i >= {blocks} {{ return; }}
  let low = {low} + i;
  let carry = select(0u, 1u, low < i);
  let r = philox(vec2<u32>(low, {high} + carry), vec2<u32>({seed_low}, {seed_high}));
  {values}
  for (var j = 0u; j < 4u; j++) {{
    if i * 4u + j < {count} {{ {put}({base} + i * 4u + j, v[j]); }}
  }}
"
        );
        PHILOX.to_owned() + &wgsl::function("box_muller", box_muller.lowered()) + &wgsl::entry(&main)
    })
}
